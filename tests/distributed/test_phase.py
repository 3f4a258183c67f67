"""The current phase of a rank, and the time that it waits for others."""

import socket
import threading
import time

import pytest

from megagpt.distributed.phase import PhaseTracker, host_name


def test_a_phase_has_a_name_and_a_duration() -> None:
    phase = PhaseTracker()
    assert phase.name == "startup"
    time.sleep(0.2)
    before = phase.seconds
    assert before >= 0.2
    phase.enter("engine construction")
    assert phase.name == "engine construction" and phase.seconds < before


def test_a_phase_of_a_step_names_the_step() -> None:
    phase = PhaseTracker()
    phase.step = 7
    phase.enter("optimizer step")
    assert phase.name == "step 7: optimizer step"


def test_waiting_time_is_added_up_until_it_is_taken() -> None:
    phase, begin = PhaseTracker(), time.perf_counter()
    for _ in range(2):
        with phase.waiting():
            time.sleep(0.05)
        time.sleep(0.1)  # not waiting
    total = time.perf_counter() - begin
    assert 0.1 <= phase.take_wait_seconds() <= total - 0.2
    assert phase.take_wait_seconds() == 0


def test_an_error_while_waiting_is_passed_on() -> None:
    phase = PhaseTracker()
    with pytest.raises(RuntimeError, match="lost"), phase.waiting():
        raise RuntimeError("lost")


def test_another_thread_sees_the_phase() -> None:
    phase, seen = PhaseTracker(), []
    phase.enter("wait for the next batch")
    thread = threading.Thread(target=lambda: seen.append(phase.name))
    thread.start()
    thread.join()
    assert seen == ["wait for the next batch"]


def test_the_host_has_its_network_name() -> None:
    assert host_name() == socket.gethostname()
