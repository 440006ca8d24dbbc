"""Open language models in and out: a Hugging Face folder or a GGUF file to a decoder folder of ours, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import torch

from mm.batch import NUM_SPECIALS
from mm.data.foreign_tokenizer import LARGEST_FILE
from mm.data.gguf_tokenizer import gguf_source
from mm.data.tokenizer import Tokenizer, import_tokenizer
from mm.decoder.counts import parameter_counts
from mm.decoder.folder import VOCABULARY, check_empty, read_decoder, write_decoder
from mm.decoder.gguf import open_gguf
from mm.decoder.huggingface import read_language_model, write_language_model
from mm.decoder.huggingface_config import read_config
from mm.decoder.imported import upcycled, with_specials, without_specials
from mm.decoder.language import LanguageModel
from mm.decoder.router import Router
from mm.files import folder_in_place

Dtype = Literal["float32", "bfloat16"]
ACCEPTED: Final = "a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file"


def import_decoder(
    path: Path,
    out: Path,
    *,
    num_experts: int | None = None,
    dtype: Dtype | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> str:
    """Reads an open model and writes it as a decoder folder.

    Args:
        path: See `ACCEPTED`.
        out: A new or empty folder.
        num_experts: Makes a mixture of so many experts from a dense model; None: as it is.
        dtype: Of the weights written; None: as they are, float32 where they were quantised. Routers' selection
            biases are never rounded: a step of them is far below bfloat16's.
        step: Is told what happens now.

    Returns:
        What was imported, and what to write into a recipe; lines of text.

    Raises:
        ValueError: It can't be read or isn't computed here; the message names what.
        ImportError: A GGUF file, and the package gguf is missing.
        OSError: A file can't be read or written.
    """
    check_empty(out)
    family: str
    if (path / "config.json").is_file():
        family, config = read_config(path / "config.json")
        step("reading the vocabulary")
        tokenizer = _vocabulary(path)
        _check_vocabulary(tokenizer, config.vocab_size, config.end_ids)
        step("reading the weights")
        model = read_language_model(path)
        if dtype is not None:
            model = _cast(model, getattr(torch, dtype))
    elif path.is_file() and path.suffix == ".gguf":
        step("reading the vocabulary")
        found = open_gguf(path)
        family, config, words = found.architecture, found.config, found.vocabulary
        source = gguf_source(pre=words.pre, tokens=words.tokens, types=words.types, merges=words.merges)
        tokenizer = import_tokenizer(source)
        _check_vocabulary(tokenizer, config.vocab_size, config.end_ids)
        step("reading the weights")
        model = found.read(dtype=getattr(torch, dtype or "float32"))
    else:
        raise ValueError(f"{str(path)!r} must be {ACCEPTED}")
    if num_experts is not None:
        step(f"making {num_experts} experts of every feed-forward")
        model = upcycled(model, num_experts=num_experts)
    model = with_specials(model)
    step("writing")
    write_decoder(model, tokenizer, out)
    return _described(family, model, tokenizer, out)


def export_decoder(folder: Path, out: Path) -> None:
    """Writes a decoder folder as a Hugging Face folder: our special ids dropped, the vocabulary as it came.

    Args:
        folder: Written by `import_decoder`.
        out: A new or empty folder.

    Raises:
        ValueError: `folder` is damaged, `out` holds something, or no published family computes such a model.
        OSError: A file can't be read or written.
    """
    check_empty(out)
    model, file = read_decoder(folder)
    tokenizer = Tokenizer.load(file)
    with folder_in_place(out) as fresh:
        write_language_model(without_specials(model), fresh)
        (fresh / VOCABULARY).write_bytes(tokenizer.open_json().encode("utf-8"))


def _cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    biases = [None if router.selection_bias is None else router.selection_bias.float() for router in routers]
    model = model.to(dtype)
    for router, bias in zip(routers, biases, strict=True):
        router.selection_bias = bias
    return model


def _vocabulary(folder: Path) -> Tokenizer:
    file = folder / VOCABULARY
    if not file.is_file():
        raise ValueError(f"{folder.name} holds no {VOCABULARY}; other forms of a vocabulary are not read")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{VOCABULARY}: at most {LARGEST_FILE} bytes are read")
    try:
        return import_tokenizer(file.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{VOCABULARY}: {error}") from error


def _check_vocabulary(tokenizer: Tokenizer, rows: int, end_ids: tuple[int, ...]) -> None:
    if tokenizer.vocab_size - NUM_SPECIALS > rows:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size - NUM_SPECIALS} tokens, the model rows for {rows}")
    spelled = [index for index in end_ids if tokenizer.spells(NUM_SPECIALS + index)]
    if spelled:
        raise ValueError(f"token {spelled[0]} ends a text, and a text can spell it: it must be an added token")


def _described(family: str, model: LanguageModel, tokenizer: Tokenizer, out: Path) -> str:
    config, counts = model.config, parameter_counts(model)
    experts = f", {config.num_experts} experts, {config.experts_per_token} a token" if config.num_experts else ""
    lines = [
        f"{family}: {config.depth} layers of width {config.width}{experts}, {str(next(model.parameters()).dtype)[6:]}",
        f"{counts.total:,} parameters, {counts.active:,} of them active for a token",
        f"vocabulary of {tokenizer.vocab_size:,} ids, ours included; context of {config.context:,} tokens",
        f"written to {out}",
    ]
    if len(config.end_ids) == 1:
        lines.append("its config.json names no end of text (eos_token_id): <end> starts as the mean row")
    lines += [
        "",
        "In a recipe (memory_width: width of the fusion):",
        "    decoder:",
        "      class_path: mm.decoder.writing.WritingModel",
        f"      init_args: {{folder: {out}, memory_width: 128}}",
        "data:",
        f"  tokenizer: {out}",
    ]
    return "\n".join(lines)
