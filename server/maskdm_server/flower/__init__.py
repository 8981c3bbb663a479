"""Everything that knows Flower's server: SuperLink, Grid, ServerApp, nodes."""
