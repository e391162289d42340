# cloudrt serve on NVIDIA GPUs: ONNX Runtime with CUDA and cuDNN from its extras; the driver comes from the host:
#   docker build -f docker/cuda.Dockerfile -t cloudrt:cuda . && docker run --gpus all -p 127.0.0.1:8000:8000 cloudrt:cuda
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /opt/cloudrt && /opt/cloudrt/bin/pip install --no-cache-dir '.[serve,cuda]'

FROM python:3.12-slim
COPY --from=build /opt/cloudrt /opt/cloudrt
RUN useradd --create-home --uid 10001 cloudrt
USER 10001
WORKDIR /home/cloudrt
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PATH=/opt/cloudrt/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["cloudrt", "serve", "--host", "0.0.0.0"]
