"""ScanNet v2 with 20 and with 200 classes, and the generated rooms in its layout."""
