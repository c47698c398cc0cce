"""
The router process: it holds the connections and never the engine's socket.
"""
