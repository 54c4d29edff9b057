"""Packed documents of realistic lengths, as the command line draws them."""

from cpflex.seeing.documents import HISTOGRAM, draw_documents

__all__ = ["HISTOGRAM", "draw_documents"]
