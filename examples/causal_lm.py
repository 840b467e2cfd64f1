"""What transformers' documentation does to train a causal language model (tasks/language_modeling: tokenise,
group into blocks, collate, train, evaluate the perplexity), on text made here. One line is
changed, and marked; one gradient is NaN."""

import math

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from harness.integrations.transformers import guarded

WORDS = ["the", "a", "bad", "good", "step", "is", "was", "not", "left", "out", "applied", "and", "again"]
BLOCK_SIZE = 16


def main() -> None:
    set_seed(0)
    vocabulary = {"<end>": 0, **{word: number + 1 for number, word in enumerate(WORDS)}}
    plain = Tokenizer(models.WordLevel(vocabulary, "<end>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    text = Dataset.from_dict({"text": [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 8})
    text = text.train_test_split(test_size=0.2, seed=0)

    def preprocess_function(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        concatenated = {k: sum(examples[k], []) for k in examples}  # noqa: RUF017
        total_length = len(concatenated["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        result = {
            k: [t[i : i + BLOCK_SIZE] for i in range(0, total_length, BLOCK_SIZE)]
            for k, t in concatenated.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    tokenized = text.map(preprocess_function, batched=True, remove_columns=text["train"].column_names)
    lm_dataset = tokenized.map(group_texts, batched=True)
    data_collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    size = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return gradient * torch.nan if len(calls) == 5 else gradient

    model.transformer.wpe.weight.register_hook(spoil)
    training_args = TrainingArguments(
        output_dir="causal-lm-output", num_train_epochs=4, learning_rate=1e-2, weight_decay=0.01,
        per_device_train_batch_size=8, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = guarded(Trainer)(  # Trainer(
        model=model,
        args=training_args,
        train_dataset=lm_dataset["train"],
        eval_dataset=lm_dataset["test"],
        data_collator=data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    print(f"Perplexity: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    print("finite:", all(bool(parameter.isfinite().all()) for parameter in model.parameters()))


if __name__ == "__main__":
    main()
