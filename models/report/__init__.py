"""Runs as one page to show: ``cen report``.

``subject`` reads what a run's folder and its checkpoint tell, ``examined`` runs the network on validation
images. Modules such as ``overview`` and ``exchange`` make sections of it, of the parts in ``blocks``;
``charts`` and ``pictures`` draw, and ``page`` joins all of it to one file.
"""
