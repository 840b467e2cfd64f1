"""TRL's SFTTrainer, guarded, on three sentences that are repeated; one gradient is NaN."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from harness.integrations.transformers import guarded

SENTENCES = ["a step that is bad is left out", "the others are applied", "and nobody is hurt"]


def main() -> None:
    torch.manual_seed(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    plain = Tokenizer(
        models.WordLevel({"<end>": 0, **{word: at + 1 for at, word in enumerate(words)}}, "<end>")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    size = {"vocab_size": len(words) + 1, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return gradient * torch.nan if len(calls) == 3 else gradient

    model.transformer.wpe.weight.register_hook(spoil)
    args = SFTConfig(
        "sft-output", max_steps=8, per_device_train_batch_size=3, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=4, max_length=16, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    data = Dataset.from_dict({"text": SENTENCES * 8})
    guarded(SFTTrainer)(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    print("finite:", all(bool(parameter.isfinite().all()) for parameter in model.parameters()))


if __name__ == "__main__":
    main()
