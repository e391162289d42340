# cloudrt serve on a CPU: ONNX Runtime and OpenVINO, without PyTorch and CUDA. Build from the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t cloudrt .
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
# ONNX Runtime's build for CPUs is 260 MB smaller than the one with CUDA, which cloudrt depends on.
RUN python -m venv /opt/cloudrt \
  && /opt/cloudrt/bin/pip install --no-cache-dir '.[serve,openvino]' \
  && /opt/cloudrt/bin/pip uninstall --yes onnxruntime-gpu \
  && /opt/cloudrt/bin/pip install --no-cache-dir 'onnxruntime>=1.28'

FROM python:3.12-slim
COPY --from=build /opt/cloudrt /opt/cloudrt
RUN useradd --create-home --uid 10001 cloudrt
USER 10001
WORKDIR /home/cloudrt
ENV PATH=/opt/cloudrt/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["cloudrt", "serve", "--host", "0.0.0.0"]
