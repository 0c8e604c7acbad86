"""``cen serve``: a trained network behind a page and a JSON endpoint.

``scenes`` runs the network on a request, ``uploads`` reads requests, ``worker`` lines them up, ``app`` is
what answers over HTTP, ``server`` the process.
"""
