"""Rollouts by a vLLM server, which reads each version of the adapter from a directory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalora.rollouts.asking import ask_for_all, checked
from megalora.rollouts.engine import Answer, Sampling
from megalora.sync.http import Http
from megalora.sync.plan import Named
from megalora.sync.versions import VersionedDirectory
from megalora.sync.vllm import VLLMClient

if TYPE_CHECKING:
    from megalora.sync.tensors import RunningAdapters


class VLLMEngine:
    """An `Engine` that samples from a vLLM server on the base, with the adapter of a running model.

    The server is started as `adapters.notes` says and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True,
    and reads `directory` under the same path. Its name for the adapter stays, the path has the
    version. Log probabilities are those of the model at temperature 1, as vLLM's --logprobs-mode
    raw_logprobs (the default) and processed_logprobs give them: nothing is cut, and what the
    model's generation_config.json says of sampling is overruled. Answers end by Sampling.stop
    alone, not by the model's own end of text.
    """

    def __init__(
        self,
        adapters: "RunningAdapters",
        server: Http,
        directory: VersionedDirectory,
        *,
        concurrency: int = 128,
    ) -> None:
        """Take the adapters to sample with, the server, and where versions are written.

        concurrency: requests of a replica at once. Nothing is sent before the first `sync`.
        """
        self._adapters, self._directory = adapters, directory
        self._client, self._concurrency = VLLMClient(server), concurrency
        self._where = f"{server.url.rstrip('/')}/v1/completions"
        self._is_synced = False

    def sync(self) -> None:
        """Write the adapters as they are now as the next version, and have the server load it.

        All ranks must call it. Versions that are no longer kept are removed once it has. Raises
        ValueError, on all ranks, where the directory cannot be written or the server refuses.
        """

        def take(tensors: Named) -> None:
            version = self._directory.next_version()
            plan = self._adapters.plan
            path = self._directory.write(version, lambda folder: plan.write(folder, tensors))
            self._client.load(self._directory.name, path)
            self._directory.prune()

        self._adapters.hand_over(take)
        self._is_synced = True

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Return an answer to each prompt; see `Engine`. ValueError where there is none."""
        if not self._is_synced:
            raise ValueError("the server has no adapter of this run yet: call sync() first")

        def ask(prompt: Sequence[int], seed: int) -> Answer:
            request = _request(self._directory.name, prompt, seed, sampling)
            return _answer(self._where, self._client.complete(request), prompt, sampling)

        replica = self._adapters.replica
        return ask_for_all(replica, prompts, sampling, ask, concurrency=self._concurrency)


def _request(model: str, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop),
        "ignore_eos": True,
        "seed": seed,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # That of the token itself alone.
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def _answer(where: str, found: dict[str, Any], prompt: Sequence[int], sampling: Sampling) -> Answer:
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"{where}: one choice was asked for, and there is {choices!r:.80}")
    choice = choices[0]
    if choice.get("prompt_token_ids") != list(prompt):
        raise ValueError(
            f"{where} has answered another prompt, of {choice.get('prompt_token_ids')!r:.80}, than "
            "was sent, or does not know return_token_ids: take vLLM 0.33"
        )
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return checked(where, choice.get("token_ids"), values, choice.get("finish_reason"), sampling)
