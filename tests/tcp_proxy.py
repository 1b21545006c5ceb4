"""A local TCP proxy whose network can be cut: bytes silently stop flowing in both directions."""

import asyncio
import contextlib
import threading


class Proxy:
    """Forwards ``url`` to ``backend``, a port that may change at any time; ``pause()`` cuts it off, ``resume()`` reconnects it.

    ``on_bytes`` is called, on the proxy's thread, whenever the backend has sent something, before it is forwarded.
    """

    def __init__(self, backend: int, on_bytes=lambda: None) -> None:
        self.backend, self._on_bytes = backend, on_bytes
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.url = self._run(self._open())

    def pause(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def resume(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.set)

    def close(self) -> None:
        async def stop():
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _open(self) -> str:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader, writer):
        await self._flowing.wait()
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            there, back = await asyncio.open_connection("127.0.0.1", self.backend)
            with contextlib.closing(back):
                ways = [
                    asyncio.ensure_future(way) for way in (self._copy(reader, back), self._copy(there, writer, is_back=True))
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _copy(self, reader, writer, *, is_back=False):
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(1 << 16):
                if is_back:
                    self._on_bytes()
                    await asyncio.sleep(0)  # a pause requested by on_bytes holds these bytes too
                await self._flowing.wait()
                writer.write(received)
                await writer.drain()
