"""
What several tests and the demo share: machines, engines, containers, the product, clients.

What makes a thing waits for it with a deadline, and takes it down.
"""
