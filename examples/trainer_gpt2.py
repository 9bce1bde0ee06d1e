"""A small GPT-2 on the characters of Python's own documentation, with the Hugging Face Trainer. Nothing is downloaded.

Run: pip install 'transformers[torch]'; python examples/trainer_gpt2.py
"""

from __future__ import annotations

from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from backmatch import BackMatchSGD

CONTEXT = 64


def windows(numbers: list[int]) -> list[dict[str, list[int]]]:
    """Consecutive pieces of a text; the model itself compares every character with the one before."""
    pieces = [numbers[start : start + CONTEXT] for start in range(0, len(numbers) - CONTEXT + 1, CONTEXT)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


if __name__ == "__main__":
    set_seed(0)
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = [alphabet[character] for character in text]
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(alphabet), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=100,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=windows(numbers[:-20_000]),
            eval_dataset=windows(numbers[-20_000:]),
            # The learning rate belongs here: Trainer leaves TrainingArguments.learning_rate to optimizers that it builds itself.
            optimizer_cls_and_kwargs=(BackMatchSGD, {"model": model}),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"test loss before {before:.3f}, after {trainer.state.global_step} steps {after:.3f} nats per character")
    assert after < before - 1
