"""Finished runs side by side: ``cen compare``.

``runs`` reads run folders, ``groups`` joins those that differ in the seed alone, ``costs`` counts and
measures their networks, ``report`` and ``picture`` show all of it.
"""
