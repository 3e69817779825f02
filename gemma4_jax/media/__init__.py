"""Pictures, videos and sounds from files to arrays, and from a list of them to the padded batch the model takes.

Pillow, PyAV, soundfile and soxr are the extra `media`; each is imported where it is used, so that text needs none of them.
"""
