"""`python -m launch.harness --model PATH --tasks NAME ...`: EleutherAI's lm-evaluation-harness on our models (extra `lm_eval`).

Its tasks ask for the likelihood of continuations and for generated text; here they get both from JAX. Tasks of one's own are YAML
files in a directory named by --include_path. Exit code 0, or 1 with one sentence.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Runs the tasks, prints the table, and writes `--output`."""
    from gemma4_jax.errors import UserError

    options = _parser().parse_args(arguments)
    try:
        results = evaluated(options)
    except UserError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    if options.output:
        Path(options.output).write_text(json.dumps(results["results"], indent=1, default=str) + "\n")
    return 0


def evaluated(options: argparse.Namespace) -> dict[str, Any]:
    """What `simple_evaluate` returns."""
    from gemma4_jax import Processor, Sampler, load
    from gemma4_jax.errors import UserError

    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"The harness is not installed ({error}): pip install 'gemma4_jax[lm_eval]'.") from None
    from launch.harness_model import HarnessModel
    from launch.models import tokenizer_beside

    manager = _manager(TaskManager, options)
    model = load(options.model, compute_dtype=options.dtype, text_only=True)
    home = options.tokenizer or tokenizer_beside(options.model)
    if home is None:
        raise UserError(f"There is no tokenizer beside {options.model}; name one with --tokenizer.")
    processor = Processor.load(home)
    length = min(options.max_length, model.cfg.max_position_embeddings)
    sampler = Sampler(model, processor, batch_size=options.batch_size, max_length=length)
    results = lm_eval.simple_evaluate(
        model=HarnessModel(model, processor, sampler, batch_size=options.batch_size),
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        apply_chat_template=options.chat,
        bootstrap_iters=0,
    )
    assert results is not None
    print(make_table(results), flush=True)
    return results


def _manager(make: Any, options: argparse.Namespace) -> Any:
    """The tasks that are known; the harness's own thousands of files, which take minutes to look through, only if need be."""
    from gemma4_jax.errors import UserError

    unknown = options.tasks
    for defaults in (False, True) if options.include_path else (True,):
        manager = make(include_path=options.include_path, include_defaults=defaults)
        unknown = [task for task in options.tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(
        f"The harness has no task {unknown[0]!r}; --include_path names a directory with tasks of one's own."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.harness", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--model", required=True, help="checkpoint: what config.model.path may be")
    parser.add_argument("--tasks", required=True, nargs="+", help="names of the harness's tasks, or of one's own")
    parser.add_argument("--tokenizer", help="tokenizer file or directory; none: beside the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="what layers compute in")
    parser.add_argument("--include_path", help="directory with YAML files of tasks")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at a time")
    parser.add_argument("--max_length", type=int, default=4096, help="most tokens of a prompt and its answer")
    parser.add_argument("--num_fewshot", type=int, help="examples in front of each question; none: the task's own")
    parser.add_argument("--limit", type=int, help="questions of each task; none: all")
    parser.add_argument("--chat", action="store_true", help="ask in chat turns, as instruction-tuned models want it")
    parser.add_argument("--output", help="JSON file for the results")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
