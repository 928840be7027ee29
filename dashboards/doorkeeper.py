"""Who may do more than look: one operator password from a file, sessions in memory, a limit on guesses. No web in here.

The file is read each time, so a new password counts at once and ends the sessions of the old one. All sessions end
with the program. A cookie holds nothing but a random token; the program keeps its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COOKIE = "fleet_session"
MOST_SESSIONS = 1000
MOST_ADDRESSES = 10_000
_ADDRESS_CHARACTERS = 64  # a proxy says what it likes
# Guesses within a minute, from one address and from everywhere.
GUESSES_PER_ADDRESS = 5
GUESSES_IN_ALL = 30
GUESS_SECONDS = 60.0
LEAST_CHARACTERS = 8


class PasswordError(RuntimeError):
    """The password file cannot be used; the text says why."""


@dataclass(frozen=True)
class Session:
    """Somebody who knew the password."""

    csrf: str
    ends_at: float  # monotonic
    password: bytes  # the digest of the one that opened it


class Guesses:
    """Wrong passwords of the last minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._by_address: dict[str, deque[float]] = {}
        self._all: deque[float] = deque(maxlen=GUESSES_IN_ALL)

    def take(self, address: str) -> float:
        """Zero if `address` may try now, else the seconds that it has to wait.

        An attempt is counted in the same step, before it is looked at, so that many at once gain nothing.
        """
        address = address[:_ADDRESS_CHARACTERS]
        with self._lock:
            now = self._clock()
            waits = [0.0]
            for past, most in ((self._by_address.get(address, deque()), GUESSES_PER_ADDRESS), (self._all, GUESSES_IN_ALL)):
                while past and now - past[0] >= GUESS_SECONDS:
                    past.popleft()
                if len(past) >= most:
                    waits.append(GUESS_SECONDS - (now - past[0]))
            if (wait := max(waits)) > 0:
                return wait
            if len(self._by_address) >= MOST_ADDRESSES:
                self._by_address.clear()
            self._by_address.setdefault(address, deque(maxlen=GUESSES_PER_ADDRESS)).append(now)
            self._all.append(now)
            return 0.0

    def forget(self, address: str) -> None:
        """The right password: what came before was no attack."""
        with self._lock:
            self._by_address.pop(address[:_ADDRESS_CHARACTERS], None)


class Doorkeeper:
    """Checks passwords and keeps sessions."""

    def __init__(self, password_file: Path | None, session_hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.password_file = password_file
        self._seconds = session_hours * 3600
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self.guesses = Guesses(clock)

    @property
    def open(self) -> bool:
        """Whether anybody can sign in at all."""
        return self.password_file is not None

    def check(self, password: str) -> bool:
        """Whether this is the operator's password; takes the same time whatever it is.

        Raises:
            PasswordError: the file is missing, cannot be read, or holds no password.

        """
        return hmac.compare_digest(digest(password), self._wanted())

    def _wanted(self) -> bytes:
        """The digest of the operator's password as it is now."""
        assert self.password_file is not None
        try:
            lines = self.password_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PasswordError(f"the password file {self.password_file} cannot be read: {reason}") from error
        wanted = lines[0].strip() if lines else ""
        if len(wanted) < LEAST_CHARACTERS:
            raise PasswordError(f"the password file {self.password_file} needs a first line of {LEAST_CHARACTERS} characters or more")
        return digest(wanted)

    def begin(self, password: str) -> str:
        """A new session's token, for whoever knew `password`."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            now = self._clock()
            self._sessions = {key: session for key, session in self._sessions.items() if session.ends_at > now}
            while len(self._sessions) >= MOST_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[digest(token)] = Session(secrets.token_urlsafe(32), now + self._seconds, digest(password))
        return token

    def find(self, token: str | None) -> Session | None:
        """The session of this token, if it has not ended and its password is still the one."""
        if not token:
            return None
        with self._lock:
            session = self._sessions.get(digest(token))
        if session is None or session.ends_at <= self._clock():
            return None
        try:
            return session if hmac.compare_digest(session.password, self._wanted()) else None
        except PasswordError:
            return None

    def end(self, token: str | None) -> None:
        with self._lock:
            self._sessions.pop(digest(token or ""), None)

    @property
    def session_seconds(self) -> int:
        return int(self._seconds)


def digest(text: str) -> bytes:
    """For comparisons that take the same time whatever is compared."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
