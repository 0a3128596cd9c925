#!/bin/sh
# Every step of an experiment, with the engine and the model of ``lenvm with-engine``: sh training/demo_head.sh CONFIG
set -e
for step in prompts rollouts train evaluate; do
    .venv/bin/lenvm $step "$1" "model.backbone=$LENVM_MODEL" "model.served_model=$LENVM_MODEL"
done
