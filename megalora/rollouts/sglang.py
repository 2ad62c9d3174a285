"""Rollouts by an SGLang server, which is sent each version of the adapter as tensors."""

import secrets
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalora.checkpoint.ranks import on_all_ranks
from megalora.rollouts.asking import ask_for_all, checked
from megalora.rollouts.engine import Answer, Sampling
from megalora.sync.http import Http
from megalora.sync.pickled import pickle_tensors
from megalora.sync.plan import Named
from megalora.sync.sglang import SGLangClient

if TYPE_CHECKING:
    from megalora.sync.tensors import RunningAdapters


class SGLangEngine:
    """An `Engine` that samples from an SGLang server, with the adapter of a running model.

    The server is started as `adapters.notes` says. Adapters travel to it in the request, through no
    directory; each version has a name of its own, and the one before is unloaded once the next is
    there, so --max-loaded-loras has to be 2 or more. Log probabilities are those of the model at
    temperature 1, nothing being cut. Seeds count where the server has
    --enable-deterministic-inference. NOTE: SGLang ends answers by the model's own end of text too,
    so that has to be among Sampling.stop, unless stop is empty.
    """

    def __init__(
        self,
        adapters: "RunningAdapters",
        server: Http,
        *,
        name: str = "policy",
        concurrency: int = 128,
    ) -> None:
        """Take the adapters to sample with and the server. All ranks must call it.

        name: that of all versions begins so. concurrency: requests of a replica at once. Nothing is
        sent before the first `sync`.
        """
        self._adapters, self._client = adapters, SGLangClient(server)
        self._where = f"{server.url.rstrip('/')}/generate"
        self._concurrency, self._version = concurrency, 0
        # Another run's versions may be there.
        self._name = on_all_ranks(lambda: f"{name}-{secrets.token_hex(4)}", only=0)

    def sync(self) -> None:
        """Send the adapters as they are now as the next version.

        All ranks must call it. Raises ValueError, on all ranks, where the server refuses.
        """

        def take(tensors: Named) -> None:
            self._client.load_tensors(
                self._named(self._version + 1),
                self._adapters.plan.adapter_config,
                pickle_tensors(tensors),
                tp_size=self._client.tp_size(),
            )

        self._adapters.hand_over(take)
        self._version += 1
        if self._version > 1:
            on_all_ranks(self._drop_last, only=0)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Return an answer to each prompt; see `Engine`. ValueError where there is none."""
        if not self._version:
            raise ValueError("the server has no adapter of this run yet: call sync() first")

        def ask(prompt: Sequence[int], seed: int) -> Answer:
            request = _request(self._named(self._version), prompt, seed, sampling)
            return _answer(self._where, self._client.generate(request), prompt, sampling)

        replica = self._adapters.replica
        return ask_for_all(replica, prompts, sampling, ask, concurrency=self._concurrency)

    def _named(self, version: int) -> str:
        return f"{self._name}-v{version:05d}"

    def _drop_last(self) -> None:
        try:
            self._client.unload(self._named(self._version - 1))
        except ValueError as error:
            # What is sampled from is the new one.
            warnings.warn(f"an earlier adapter stays on the server: {error}", stacklevel=2)


def _request(adapter: str, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    return {
        "input_ids": list(prompt),
        "lora_path": adapter,
        "return_logprob": True,
        "logprob_start_len": -1,
        "sampling_params": {
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop),
            # It would leave out stop_token_ids too.
            "ignore_eos": not sampling.stop,
            "sampling_seed": seed,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
    }


def _answer(where: str, found: dict[str, Any], prompt: Sequence[int], sampling: Sampling) -> Answer:
    meta = found.get("meta_info")
    meta = meta if isinstance(meta, dict) else {}
    if meta.get("prompt_tokens") != len(prompt):
        raise ValueError(
            f"{where} has answered a prompt of {meta.get('prompt_tokens')!r:.80} tokens, "
            f"{len(prompt)} were sent"
        )
    pairs = meta.get("output_token_logprobs")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) >= 2 for p in pairs):
        raise ValueError(f"{where}: log probabilities were asked for, and there is {pairs!r:.80}")
    tokens = found.get("output_ids")
    if tokens != [pair[1] for pair in pairs]:
        raise ValueError(
            f"{where}: log probabilities are of other tokens than output_ids {tokens!r:.80}"
        )
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else reason
    return checked(where, tokens, [pair[0] for pair in pairs], kind, sampling)
