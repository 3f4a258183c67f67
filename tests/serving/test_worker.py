"""Every rank of a tensor-parallel server runs the same steps by the first rank's commands."""

import asyncio
import threading

import torch.distributed as dist
from support.pool import Pool
from support.runs import tiny_config

from megagpt.data.tokenizer import ByteTokenizer
from megagpt.distributed.object_collectives import broadcast_object
from megagpt.inference.engine import GenerationEngine
from megagpt.inference.generate import TextGenerator
from megagpt.inference.sampling import Sampling
from megagpt.model.chunk import build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology
from megagpt.serving.metrics import Metrics
from megagpt.serving.worker import EngineLoop, EngineWorker, Text

PROMPTS = [b"abc", b"a longer one", b"x", b"yz"]


def generator_of(parallel: ParallelContext, tensor: int) -> TextGenerator:
    config = tiny_config(model={"vocab_size": 257, "n_positions": 64, "init_std": 0.5}, parallel={"tensor": tensor})
    model = build_chunk(config, parallel, range(config.model.n_layer)).eval()
    return TextGenerator(GenerationEngine(model, (256,), 257, 200, 2), ByteTokenizer())


async def answers_of(worker: EngineWorker) -> list[str]:
    """Return the texts of four requests; a fifth one is given up after its first event."""
    texts = [Text(list(prompt), Sampling(12, temperature=0), ()) for prompt in PROMPTS]
    tickets = worker.submit([*texts, Text([1], Sampling(60, temperature=0), ())])
    async for _ in tickets[4].events():
        break

    async def text_of(number: int) -> str:
        return "".join([event.text async for event in tickets[number].events()])

    return await asyncio.gather(*(text_of(number) for number in range(4)))


def serve_on_ranks() -> list[str]:
    generator = generator_of(ParallelContext.of(Topology.create(2, 1), False, DeferredGradients()), 2)
    if dist.get_rank() == 1:
        EngineLoop(generator, lambda wait: broadcast_object(None)).run()
        return []
    worker = EngineWorker(generator, Metrics(), 10, broadcast_object)
    worker.start()
    texts = asyncio.run(answers_of(worker))
    worker.stop()
    assert not any(thread.name == "generation engine" for thread in threading.enumerate())
    return texts


def test_tensor_parallel_ranks_serve_what_one_process_does(ranks: Pool) -> None:
    alone = generator_of(ParallelContext(), 1)
    expected = [alone.add(list(prompt), Sampling(12, temperature=0)) for prompt in PROMPTS]
    list(alone.run())
    assert ranks.run(2, serve_on_ranks) == [[completion.text for completion in expected], []]
