"""Routers, one idea a file: each module lists its own in ``ROUTERS``, see `llmsched routers`."""
