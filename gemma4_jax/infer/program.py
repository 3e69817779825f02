"""The task `sample`: prompts from the command line or a file, answers to the screen and to a file."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gemma4_jax.errors import UserError
from gemma4_jax.infer.generate import Completion, SampleConfig, Sampler
from gemma4_jax.infer.prompts import Prompt

PROGRESS_SECONDS = 5.0


def run_sample(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: SampleConfig,
    *,
    seed: int = 0,
    output: str | None = None,
    write: Callable[[str], None] = print,
) -> list[Completion]:
    """Answers the prompts and writes what came; `output` is a JSONL file with one row per prompt, made before anything runs.

    `config.stop` ends answers besides the tokenizer's stop tokens. The rate counts everything, compilation included.
    """
    file = None if output is None else _open(output)
    try:
        started = time.perf_counter()
        completions = answer(sampler, prompts, config, seed=seed, write=write)
        seconds = time.perf_counter() - started
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            write(f"\n[{number}/{len(prompts)}] {_last_words(prompt)}\n{shown(completion)}")
            if file is not None:
                file.write(json.dumps(_row(prompt, completion), ensure_ascii=False) + "\n")
    finally:
        if file is not None:
            file.close()
    tokens = sum(len(completion.tokens) for completion in completions)
    where = "" if output is None else f"; written to {output}"
    drafting = sampler.engine.drafting
    guessed = "" if drafting is None else f"; {drafting.report()}"
    count = f"{len(completions)} answer{'s' * (len(completions) != 1)}"
    rate = f"{tokens / seconds:.1f} tokens/s"
    write(f"\n{count}, {tokens} tokens in {seconds:.1f} s with compiling: {rate}{guessed}{where}")
    return completions


def answer(
    sampler: Sampler, prompts: Sequence[Prompt], config: SampleConfig, *, seed: int, write: Callable[[str], None]
) -> list[Completion]:
    """`Sampler.generate` by the settings, with a line of progress every few seconds."""
    last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done < total and time.perf_counter() - last > PROGRESS_SECONDS:
            last = time.perf_counter()
            write(f"answered {done}/{total}")

    return sampler.generate(
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=seed,
        stop=[*sampler.stop_ids, *config.stop],
        enable_thinking=config.enable_thinking,
        progress=progress,
        **config.form.options(),
    )


def _open(output: str) -> TextIO:
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        return Path(output).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"The answers cannot be written to {output} ({error.strerror}).") from None


def _last_words(prompt: Prompt) -> str:
    """A prompt in a few lines: the text, or the last message."""
    messages: Any = prompt["messages"] if isinstance(prompt, Mapping) else prompt
    if isinstance(messages, str) or not isinstance(messages[-1], Mapping):
        return str(messages)
    message = messages[-1]
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [{"text": content or ""}]
    text = " ".join(str(part.get("text") or f"<{part.get('type')}>") for part in parts)
    return f"{message.get('role')}: {text}"


def shown(completion: Completion) -> str:
    """An answer for the screen."""
    lines = [f"thought: {completion.thought}"] if completion.thought else []
    lines += [
        f"call: {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in completion.tool_calls
    ]
    lines += [f"unreadable call: {text}" for text in completion.malformed]
    if completion.text or not lines:
        lines.append(completion.text or "(nothing)")
    if completion.finish_reason == "length":
        lines.append("(cut off by max_new_tokens)")
    return "\n".join(lines)


def _row(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """An answer for the file, beside its prompt."""
    row: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
    return {
        **row,
        "completion": completion.text,
        "thought": completion.thought,
        "tool_calls": completion.tool_calls,
        "finish_reason": completion.finish_reason,
        "tokens": completion.tokens,
        "logprobs": [round(value, 4) for value in completion.logprobs],
    }
