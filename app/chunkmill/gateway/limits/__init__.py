"""How much each key may use, and how much may wait in this process.

``limits`` is what handlers call. Below it, ``buckets`` count a minute, ``months`` books a month in Postgres, and
``room`` bounds what waits.
"""
