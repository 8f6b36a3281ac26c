"""A network of namespaces: an internet behind a wire, a stand-in for the host, and frames that nobody should send."""
