"""Links: how parcels travel between ranks. One contract for all."""
