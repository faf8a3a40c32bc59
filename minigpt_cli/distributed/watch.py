"""What a worker does about the launcher that started it: end when the launcher has gone.

Called before torch is imported, and imports nothing heavy itself.
"""

import os
import signal
import threading
import time

LAUNCHER = "MINIGPT_LAUNCHER_PID"
"""Environment variable: the launcher's process id, for the workers that it starts."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask to save and stop. A worker starts with them blocked, so that one which comes
while it is still starting waits instead of killing it."""


def follow_launcher() -> None:
    """In a worker: let the signals come through, and follow the launcher. Elsewhere: nothing.

    To be called once, first of all, in the main thread.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # not for processes which this one starts
    if launcher is None:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before there is a handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    follow_parent(int(launcher))


def follow_parent(parent: int, grace_seconds: float = 60) -> None:
    """Stop this process soon after process ``parent`` has gone, however that one ended.

    A daemon thread looks twice a second whether ``parent`` is still our parent. When it isn't, also
    when it had gone before this call, the thread sends SIGTERM to this process, which saves and
    exits; if it hasn't within ``grace_seconds``, it ends here and now with exit code 75.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os._exit(75)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
