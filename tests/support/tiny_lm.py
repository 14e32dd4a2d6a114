"""The smallest things with the interfaces that evaluation needs, made on the spot."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257  # bytes and one special token


class Bigram(torch.nn.Module):
    """Next-token logits that are a row of a table: every figure has a closed form."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table, requires_grad=False)  # [V, V]

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.table[input_ids])

    def log_p(self) -> torch.Tensor:
        return self.table.double().log_softmax(-1)


def random_bigram(vocabulary: int = 11, seed: int = 0) -> Bigram:
    return Bigram(torch.randn(vocabulary, vocabulary, generator=torch.manual_seed(seed)))


def random_ids(count: int, vocabulary: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.manual_seed(seed))


def tiny_llama(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Two layers with weights large enough that context matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no merges, no automatic special token and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
