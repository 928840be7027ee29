"""The counting proxy passes bytes on unchanged and counts each direction."""

from __future__ import annotations

import socket
import threading

from benchmarks.counting_proxy import CountingProxy


def test_it_passes_everything_on_and_counts_both_directions():
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            received = b""
            while data := connection.recv(4096):
                received += data
            connection.sendall(received[::-1] * 2)

    thread = threading.Thread(target=serve)
    thread.start()
    proxy = CountingProxy(server.getsockname())
    sent = bytes(range(256)) * 1000
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(65_536):
            answer += data
    thread.join(30)
    proxy.close()
    server.close()
    assert answer == sent[::-1] * 2
    assert (proxy.up, proxy.down) == (len(sent), 2 * len(sent))
