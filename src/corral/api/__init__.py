"""HTTP in front of the store: REST, OpenAPI, watch streams, exec and console sockets. Never calls a controller."""
