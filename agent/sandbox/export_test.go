package sandbox

// OnSpareThread is for tests that make namespaces of their own.
var OnSpareThread = onSpareThread
