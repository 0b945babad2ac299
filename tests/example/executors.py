"""Executors that tests name as a user would, ``module:callable``."""

from concurrent.futures import ThreadPoolExecutor


def threads():
    return ThreadPoolExecutor(2)


def dask():
    """Two workers of a local cluster, a process each, which end with the executor."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    client = Client(cluster)
    executor = client.get_executor()
    end = executor.shutdown

    def shutdown(*arguments, **more):
        end(*arguments, **more)
        client.close()
        cluster.close()

    executor.shutdown = shutdown
    return executor


def nothing():
    return object()
