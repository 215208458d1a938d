"""An emulated cluster on one machine: real processes and sockets, nodes, links and cores that are rationed."""
