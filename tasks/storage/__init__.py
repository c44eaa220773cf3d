"""Storage: what lies on disk, snapshots, exports, journals, input and output tables."""
