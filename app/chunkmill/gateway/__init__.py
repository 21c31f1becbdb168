"""The gateway: what Chunkmill does, over HTTP. It keeps nothing, so that any number of them may stand side by side.

``app`` builds the ASGI application from the endpoints in ``routes``; ``server`` runs it. ``keys`` says who asks, and
``errors`` is the one form of every refusal.
"""
