"""Answers over HTTP. `server` runs it; nothing is imported here, because aiohttp is slow to import."""
