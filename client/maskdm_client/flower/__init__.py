"""Everything that knows Flower's client: SuperNode, ClientApp, their pins."""
