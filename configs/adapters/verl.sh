#!/bin/sh
# Run from the repository's root; data as verl's documentation prepares it.
PYTHONPATH=configs/adapters torchrun --standalone --nproc-per-node 8 -m verl.trainer.sft_trainer \
	model.path=Qwen/Qwen2.5-0.5B-Instruct \
	model.external_lib=verl_objective \
	data.train_files="$HOME/data/gsm8k_sft/train.parquet" \
	data.train_batch_size=64 \
	data.micro_batch_size_per_gpu=4 \
	optim.lr=1e-5 \
	trainer.total_epochs=3 \
	trainer.project_name=bl \
	trainer.experiment_name=qwen2.5-0.5b-neg-p
