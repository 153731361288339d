"""The tokenizer: trained on the run's data, or loaded from a file or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from svend.data.chat import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_MESSAGE,
    END_OF_TEXT,
    ROLE_TOKENS,
    render,
)
from svend.data.documents import Document, Message, Role
from svend.errors import DataError, reason_of


class DocumentTokenizer:
    """A byte-level BPE with Svend's control tokens.

    added: the control tokens that the tokenizer lacked, and was given here.
    """

    def __init__(self, tokenizer: Tokenizer, *, origin: str) -> None:
        known = tokenizer.get_vocab(with_added_tokens=True)
        self.added = tuple(token for token in CONTROL_TOKENS if token not in known)
        # Also where a loaded file has them as ordinary tokens, which text could spell.
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.origin = origin
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.control_ids = {token: vocabulary[token] for token in CONTROL_TOKENS}
        # Not the number of entries: a file may leave ids out, and the embedding is read by id.
        self.size = max(vocabulary.values()) + 1

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type of integer that takes every token id."""
        return np.uint16 if self.size <= 2**16 else np.uint32

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the whole tokenizer in the `tokenizer.json` format."""
        return self._tokenizer.to_str(pretty=True)

    def files(self) -> dict[str, str]:
        """Return the content of the files from which transformers reads the tokenizer, by name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_MESSAGE,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": list(CONTROL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        return {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(config, indent=1),
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    def encode(self, documents: list[Document]) -> list[list[int]]:
        """Return the token ids of each document, by the template."""
        tokens, lengths = self.encode_flat(documents)
        return [ids.tolist() for ids in np.split(tokens, np.cumsum(lengths)[:-1])]

    def encode_flat(
        self, documents: list[Document]
    ) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.uint32]]:
        """Return the token ids of all documents, one after the other, and the length of each."""
        texts = [message.content for document in documents for message in document.messages]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = (encoding.ids for encoding in encoded)
        rendered = [render(document, ids, self.control_ids) for document in documents]
        lengths = np.array([sum(map(len, pieces)) for pieces in rendered], dtype=np.uint32)
        flat = chain.from_iterable(chain.from_iterable(rendered))
        return np.fromiter(flat, self.dtype, int(lengths.sum())), lengths

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of what comes before the model speaks.

        Where tools are declared the model begins by choosing between an answer and a call.
        """
        ids = []
        for message in messages:
            ids += self.encode_message(message)
        if all(message.role is not Role.TOOLS for message in messages):
            ids.append(self.control_ids[ROLE_TOKENS[Role.ASSISTANT]])
        return ids

    def encode_message(self, message: Message) -> list[int]:
        """Return the token ids of one message that has a role, its end included."""
        start = self.control_ids[ROLE_TOKENS[message.role]]
        return [start, *self.encode_text(message.content), self.control_ids[END_OF_MESSAGE]]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of bare text; what imitates a control token is text too."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, control tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> DocumentTokenizer:
    """Train a byte-level BPE on these documents, of at most `vocab_size` entries.

    Every digit is a token of its own, so that numbers are read by place value. Pairs seen once
    are not merged: small data gives fewer entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message.content for document in documents for message in document.messages)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return DocumentTokenizer(tokenizer, origin="trained on this run's data")


def load_tokenizer(name: str, vocab_size: int) -> DocumentTokenizer:
    """Load a `tokenizer.json`, or a hub repository's by name.

    Raises DataError if it cannot be read or has more entries than the model's embedding.
    """
    try:
        if Path(name).is_file():
            tokenizer = Tokenizer.from_file(name)
        elif name.endswith(".json"):
            raise DataError(f"training.data.tokenizer {name}: no such file")
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for any failure
        raise DataError(
            f"training.data.tokenizer {name}: cannot be loaded ({reason_of(error)}); "
            "give a tokenizer.json, a hub name that can be reached, or 'train'"
        ) from None
    loaded = DocumentTokenizer(tokenizer, origin=name)
    if loaded.size > vocab_size:
        raise DataError(
            f"training.data.tokenizer {name}: {loaded.size} entries with the control tokens, "
            f"more than the model's {vocab_size}; choose a smaller one or raise model.vocab_size"
        )
    return loaded
