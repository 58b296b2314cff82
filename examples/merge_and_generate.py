"""Merge a LoRA run into its base and answer a question: `python examples/merge_and_generate.py RUN OUTPUT [PROMPT]`.

After `make quickstart`:
    python examples/merge_and_generate.py quickstart/run out/merged "Ann Lee, 31, lives in Oslo."
"""

import sys

from transformers import pipeline

from bl_trainer.cli import main as bl_trainer


def main(run: str, output: str, prompt: str = "What is the capital of France?") -> str:
    """Merge `run` into `output`, and return the merged model's answer to `prompt`."""
    bl_trainer(["merge", run, "--output", output])
    generator = pipeline("text-generation", model=output)
    messages = [{"role": "user", "content": prompt}]
    answer = generator(messages, max_new_tokens=64, do_sample=False, return_full_text=False)[0]["generated_text"]
    print(answer)
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
