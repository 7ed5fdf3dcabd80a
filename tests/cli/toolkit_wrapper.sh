#!/bin/sh
# A wrapper written for Apple's adapter training toolkit: train, look, export, pack. It uses the toolkit's own
# commands and options. In the toolkit's folder, with its Python:
#
#   EXAMPLES="python -m examples." EXPORT="python -m export." sh toolkit_wrapper.sh train.jsonl eval.jsonl out
#
# With this library, the program's name is all that changes:
#
#   EXAMPLES="mlx-afm toolkit " EXPORT="mlx-afm toolkit " sh toolkit_wrapper.sh train.jsonl eval.jsonl out
set -eu
train=$1 eval=$2 out=$3

${EXAMPLES}train_adapter --train-data "$train" --eval-data "$eval" --epochs 3 --learning-rate 1e-3 \
    --warmup-epochs 1 --batch-size 4 --gradient-accumulation-steps 1 --activation-checkpointing \
    --precision bf16-mixed --compile-model --weight-decay 0.01 --clip-grad-norm 1.0 \
    --max-sequence-length 512 --fixed-sized-sequences --loss-update-frequency 3 \
    --checkpoint-dir "$out/checkpoints" --checkpoint-frequency 1

test -f "$out/checkpoints/adapter-final.pt"
ls "$out"/checkpoints/adapter-epoch*.pt

printf '%s\n' '[{"role": "user", "content": "sort vido.conf in reverse"}]' \
    '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "list files"}]}' \
    > "$out/prompts.jsonl"
${EXAMPLES}generate --prompt "$out/prompts.jsonl" --checkpoint "$out/checkpoints/adapter-final.pt" \
    --precision bf16 --temperature 0 --top-k 50 --max-new-tokens 12 --batch-size 2 --num_draft_tokens 5 \
    > "$out/answers.txt"

${EXPORT}export_fmadapter --output-dir "$out" --adapter-name my_adapter \
    --checkpoint "$out/checkpoints/adapter-final.pt" --author "A developer" --description "A test" -v

if command -v xcrun > /dev/null; then
    ${EXPORT}produce_asset_pack --fmadapter-path "$out/my_adapter.fmadapter" --output-path "$out/my_adapter.aar" \
        --platforms iOS,macOS --download-policy PREFETCH --installation-event-type FIRST_INSTALLTION
fi
