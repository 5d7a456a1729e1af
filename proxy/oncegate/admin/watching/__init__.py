"""What pages watch: the metrics of the last minutes, the store on a connection of its own, and streams of both."""
