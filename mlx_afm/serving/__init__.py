"""An OpenAI-compatible HTTP server: one base in memory, many adapters, each a model id of its own.

with running("afm-mlx", {"poet": Path("poet.fmadapter")}, ServeConfig(port=0)) as server:
    print(server.url, server.models)
"""

from mlx_afm.files import parse_bytes
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.running import Running, find_adapters, running, serve, settle

__all__ = ["Running", "ServeConfig", "find_adapters", "parse_bytes", "running", "serve", "settle"]
