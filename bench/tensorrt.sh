#!/usr/bin/env bash
# Check cloudrt on a machine with TensorRT, because the tests run without it.
#
#   bench/tensorrt.sh best.pth test_images/ [OUT]
#
# best.pth is a checkpoint of cloudrt-train, test_images/ holds JPEGs like yours, and all files are written to OUT
# (default: tensorrt-check/). The script exports in fp16 and int8 with the gate in TensorRT, runs both, and the fp32
# artifact on the CPU, compares the submissions, runs again to check that the engine is loaded from the cache, and
# measures the speed. It stops at the first failure; include OUT/log.txt in a bug report. PROVIDER=cpu tests the script
# itself without TensorRT.
set -euo pipefail

checkpoint=${1:?usage: bench/tensorrt.sh best.pth test_images/ [OUT]}
images=${2:?usage: bench/tensorrt.sh best.pth test_images/ [OUT]}
out=${3:-tensorrt-check}
provider=${PROVIDER:-tensorrt}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1

step() { printf '\n== %s\n' "$*"; }

# Fail unless two submissions have a Dice of at least $3 with each other.
alike() {
  cloudrt score "$1" "$2" --truth-grid 525x350 --json | python3 -c "
import json, sys
found, least = json.load(sys.stdin)['mean'], float('$3')
print(f'Dice between the submissions {found:.4f}, at least {least}')
sys.exit(found < least)"
}

step "Versions and providers"
cloudrt doctor
cloudrt doctor --json > "$out/doctor.json"

step "fp32 on the CPU: the reference"
cloudrt export "$checkpoint" -o "$out/fp32.onnx" --precision fp32 --data "$images" --provider cpu
cloudrt infer "$images" --model "$out/fp32.onnx" --provider cpu -o "$out/cpu.csv" --overwrite

step "fp16 in $provider: the gate, then the engine for batches of 32"
build=(); [ "$provider" = tensorrt ] && build=(--build-engine)
cloudrt export "$checkpoint" -o "$out/fp16.onnx" --data "$images" --provider "$provider" "${build[@]}"
cloudrt infer "$images" --model "$out/fp16.onnx" --provider "$provider" -o "$out/fp16.csv" --overwrite
alike "$out/fp16.csv" "$out/cpu.csv" 0.995

step "Again: the engine is loaded from the cache, and the submission is byte-identical"
SECONDS=0
cloudrt infer "$images" --model "$out/fp16.onnx" --provider "$provider" -o "$out/again.csv" --overwrite
echo "second run: $SECONDS s"
cmp "$out/fp16.csv" "$out/again.csv"

step "int8 for TensorRT, calibrated on these images"
cloudrt export "$checkpoint" -o "$out/int8.onnx" --precision int8 --int8-target tensorrt \
  --data "$images" --provider "$provider"
if [ "$provider" = tensorrt ]; then
  cloudrt infer "$images" --model "$out/int8.onnx" --provider tensorrt -o "$out/int8.csv" --overwrite
  alike "$out/int8.csv" "$out/cpu.csv" 0.98
fi

step "Speed"
cloudrt bench "$out/fp16.onnx" --data "$images" --provider "$provider" --max-images 256 --only stages -o "$out/bench.json"

step "All passed. Files in $out"
