"""The server: a page, an HTTP interface and the Open Inference Protocol on one Segmenter; needs the extra `serve`."""
