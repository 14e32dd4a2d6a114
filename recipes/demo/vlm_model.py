"""The demo multimodal model before it has learned anything, and how questions are packed for it.

processor, packing = build_processor(), Packing(processor.tokenizer, 12)
logits = packing.logits(build_model(width=128, tower_layers=4, layers=12), images, ids)
"""

from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.recipes.demo import scenes

PAD, EOS, IMAGE, UNKNOWN = SPECIAL = ("<pad>", "<eos>", "<image>", "<unk>")
IGNORED = -100  # label that cross_entropy leaves out
VISUAL = scenes.GRID**2  # visual tokens of a picture
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def build_processor() -> transformers.LlavaProcessor:
    """Words to tokens one to one, pictures by pillow; a prompt is `<image> what is red ?`."""
    # Its own import: the rest of the file needs no pillow.
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = {word: i for i, word in enumerate((*SPECIAL, *scenes.WORDS))}
    words_to_tokens = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    words_to_tokens.normalizer = normalizers.Lowercase()
    words_to_tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_to_tokens,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=512,
    )
    return transformers.LlavaProcessor(
        SiglipImageProcessorPil(size={"height": scenes.SIDE, "width": scenes.SIDE}),
        tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    width: int, tower_layers: int, layers: int
) -> transformers.LlavaForConditionalGeneration:
    """A SigLIP tower without pooling head, a two-layer projector and a Llama, in fp32."""
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=tower_layers,
            num_attention_heads=4,
            image_size=scenes.SIDE,
            patch_size=scenes.PATCH,
            vision_use_head=False,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(SPECIAL) + len(scenes.WORDS),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=SPECIAL.index(EOS),
            pad_token_id=SPECIAL.index(PAD),
        ),
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=VISUAL,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def normalise(images: np.ndarray) -> Tensor:
    """[n, SIDE, SIDE, 3] bytes to [n, 3, SIDE, SIDE] in [-1, 1], as the image processor does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Packing:
    """Several questions about a picture in one sequence: visual tokens, then equal slots.

    A slot is question, answer, padding; the end of the answer is only predicted. `mask`
    [1, 1, T, T] lets a token see the visual tokens and the earlier ones of its own slot.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, slots: int):
        bank = tokenizer([q.text for q in scenes.QUESTIONS])["input_ids"]
        self.answers = torch.tensor(tokenizer.convert_tokens_to_ids(list(scenes.ANSWERS)))
        self.length = torch.tensor([len(ids) for ids in bank])
        self.slot = int(self.length.max()) + 1
        self.bank = torch.tensor([ids + [0] * (self.slot - len(ids)) for ids in bank])
        index = torch.arange(VISUAL + slots * self.slot)
        visual = index < VISUAL
        block = (index - VISUAL).div(self.slot, rounding_mode="floor")
        seen = visual[None, :] | (block[:, None] == block[None, :])
        self.mask = (seen & (index[None, :] <= index[:, None]))[None, None]
        self.positions = torch.where(visual, index, VISUAL + (index - VISUAL) % self.slot)[None]

    def pack(self, table: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and labels [n, slots * slot] of the chosen questions; a -1 leaves a slot unlabelled.

        The label of a position is the token to be said there: after the question the answer, after
        the answer the end.
        """
        asked = torch.from_numpy(np.maximum(chosen, 0))
        answer = torch.from_numpy(np.take_along_axis(table, asked.numpy(), axis=1))
        word, end = self.answers[answer][..., None], self.length[asked][..., None]
        ids = self.bank[asked].scatter(2, end, word)
        labels = torch.full_like(ids, IGNORED).scatter(2, end - 1, word)
        labels = labels.scatter(2, end, SPECIAL.index(EOS))
        labels[torch.from_numpy(chosen < 0)] = IGNORED
        return ids.flatten(1), labels.flatten(1)

    def logits(self, model: Any, images: np.ndarray, ids: Tensor) -> Tensor:
        """[n, VISUAL + text, vocabulary], fp32; equal to asking each question alone."""
        features = torch.stack(list(model.get_image_features(normalise(images)).pooler_output))
        # The residual stream is bf16 in training as in the saved model.
        words = model.get_input_embeddings()(ids).to(features.dtype)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([features, words], dim=1),
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden).float()


def answer_loss(logits: Tensor, labels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of answers and ends; whether each question [n, slots] is answered exactly."""
    said = logits[:, VISUAL:]
    loss = cross_entropy(said.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    right = (said.argmax(-1) == labels) | (labels == IGNORED)
    return loss, right.unflatten(1, (slots, -1)).all(-1)
