"""
The controller process, with its pure core and the router process in folders of their own.
"""
