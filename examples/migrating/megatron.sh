#!/bin/bash
# Arguments of Megatron-LM for an 8B model with grouped heads, for tools/convert_config.py.
MODEL="--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8
       --ffn-hidden-size 14336 --seq-length 8192 --max-position-embeddings 8192 --vocab-size 128256
       --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
       --position-embedding-type rope --rotary-base 500000 --attention-dropout 0 --hidden-dropout 0"
LAYOUT="--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
TRAINING="--micro-batch-size 1 --global-batch-size 512 --train-iters 100000 --bf16 --lr 3e-4 --min-lr 3e-5
          --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0"
DATA="--data-path data/my_corpus_text_document --split 969,30,1 --tokenizer-type SentencePieceTokenizer
      --tokenizer-model data/tokenizer.model"
OUTPUT="--save runs/8B/checkpoints --load runs/8B/checkpoints --save-interval 1000 --eval-interval 1000 --eval-iters 10"
torchrun --nproc_per_node 8 pretrain_gpt.py $MODEL $LAYOUT $TRAINING $DATA $OUTPUT --moe-grouped-gemm
