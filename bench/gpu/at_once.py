"""A plugin of pytest: a failure is shown when it happens, so that a run that is stopped has shown it."""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n{report.nodeid}, {report.when}\n{report.longreprtext}", flush=True)
