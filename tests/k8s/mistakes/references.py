"""Names and selectors that lead nowhere, and secrets in plain sight."""

from __future__ import annotations

from tests.k8s.mistakes.places import Mistake, cluster, drop, mlflow, worker
from tests.k8s.rendered import one

MISTAKES = (
    Mistake(
        "a secret in plain sight",
        lambda d: mlflow(d)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}),
        (r"^Deployment/mlflow .*value: AWS_SECRET_ACCESS_KEY holds its value in plain sight",),
    ),
    Mistake(
        "a password in a URL",
        lambda d: mlflow(d)["args"].__setitem__(4, "--backend-store-uri=postgresql://mlflow:pw@mlflow-postgres/mlflow"),
        (r"^Deployment/mlflow .*args\[4\]: a URL with its password",),
    ),
    Mistake(
        "a secret among the manifests",
        lambda d: d.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "realign-redis", "namespace": "realign"},
                "stringData": {"password": "x"},
            }
        ),
        (r"^Secret/realign-redis data: a secret's value lies",),
    ),
    Mistake(
        "a secret that nobody makes",
        lambda d: worker(d, 0)["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"].update(name="mlflow-login"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*there is no secret mlflow-login",),
    ),
    Mistake(
        "a key that the secret lacks",
        lambda d: worker(d, 0)["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"].update(key="user"),
        (r"^RayCluster/realign spec.workerGroupSpecs\[0\].*realign-mlflow has no key user",),
    ),
    Mistake(
        "a claim that is not there",
        lambda d: drop(d, "PersistentVolumeClaim", "realign-models"),
        (r"^Ray(Cluster|Job|CronJob)/\S+ .*volumes\[1\]: there is no PersistentVolumeClaim realign-models",),
    ),
    Mistake(
        "a ConfigMap under another name",
        lambda d: mlflow(d)["env"][2]["valueFrom"]["configMapKeyRef"].update(name="settings"),
        (r"^Deployment/mlflow .*env\[2\]: there is no ConfigMap settings",),
    ),
    Mistake(
        "an account that is not there",
        lambda d: drop(d, "ServiceAccount", "realign-services"),
        (r"^(Deployment|StatefulSet)/\S+ .*there is no ServiceAccount realign-services",),
    ),
    Mistake(
        "a service that finds nobody",
        lambda d: one(d, "Service", "mlflow")["spec"].update(selector={"app": "mlflow"}),
        (r"^Service/mlflow spec.selector: selects no pod",),
    ),
    Mistake(
        "a service to a port that is closed",
        lambda d: one(d, "Service", "mlflow")["spec"]["ports"][0].update(targetPort=8080),
        (r"^Service/mlflow spec.ports\[0\].targetPort: Deployment/mlflow has no port 8080",),
    ),
    Mistake(
        "a budget that protects nothing",
        lambda d: one(d, "PodDisruptionBudget", "realign-head")["spec"]["selector"]["matchLabels"].update(
            {"ray.io/cluster": "other"}
        ),
        (
            r"^PodDisruptionBudget/realign-head spec.selector: selects no pod",
            r"^RayCluster/realign spec.headGroupSpec.template: no PodDisruptionBudget",
        ),
    ),
    Mistake(
        "a head that may be drained away",
        lambda d: drop(d, "PodDisruptionBudget", "realign-run-head"),
        (r"^RayJob/realign-run spec.rayClusterSpec.headGroupSpec.template: no PodDisruptionBudget",),
    ),
    Mistake(
        "a budget that Kubernetes cannot count",
        lambda d: one(d, "PodDisruptionBudget", "realign-head")["spec"].update(minAvailable="50%"),
        (r"^PodDisruptionBudget/realign-head spec.minAvailable: Kubernetes cannot count",),
    ),
    Mistake(
        "Redis that is not there",
        lambda d: cluster(d)["gcsFaultToleranceOptions"].update(redisAddress="redis://redis:6379"),
        (r"^RayCluster/realign spec.gcsFaultToleranceOptions.redisAddress: no Service answers",),
    ),
    Mistake(
        "Redis at another port",
        lambda d: one(d, "Service", "realign-redis")["spec"]["ports"][0].update(port=6380),
        (r"^RayCluster/realign spec.gcsFaultToleranceOptions.redisAddress: Service/realign-redis has no port 6379",),
    ),
    Mistake(
        "Redis without a password",
        lambda d: cluster(d)["gcsFaultToleranceOptions"].pop("redisPassword"),
        (r"^RayCluster/realign spec.gcsFaultToleranceOptions.redisPassword: Redis without a password",),
    ),
    Mistake(
        "one thing twice",
        lambda d: d.append(one(d, "Service", "mlflow")),
        (r"^Service/mlflow metadata.name: defined 2 times",),
    ),
    Mistake(
        "MLflow without passwords",
        lambda d: mlflow(d)["args"].remove("--app-name=basic-auth"),
        (r"^Deployment/mlflow .*args: MLflow asks nobody for a password",),
    ),
    Mistake(
        "MLflow that takes any host",
        lambda d: mlflow(d)["args"].__setitem__(6, "--allowed-hosts=*"),
        (r"^Deployment/mlflow .*MLflow checks no host names",),
    ),
    Mistake(
        "MLflow under a name that it refuses",
        lambda d: one(d, "ConfigMap", "realign-settings")["data"].update(
            MLFLOW_TRACKING_URI="http://mlflow.realign.svc:80"
        ),
        (
            r"^ConfigMap/realign-settings data.MLFLOW_TRACKING_URI: the server answers 403 to mlflow.realign.svc:80",
            r"^ConfigMap/realign-config data.realign.yaml: tracking.uri is .*:5000, the pods' .*:80; name one server",
        ),
    ),
    Mistake(
        "a key that the ConfigMap lacks",
        lambda d: mlflow(d)["env"][2]["valueFrom"]["configMapKeyRef"].update(key="BUCKET"),
        (r"^Deployment/mlflow .*env\[2\]: the ConfigMap realign-settings has no key BUCKET",),
    ),
    Mistake(
        "a secret in a ConfigMap",
        lambda d: one(d, "ConfigMap", "realign-settings")["data"].update(HF_TOKEN="hf_abc"),
        (r"^ConfigMap/realign-settings data.HF_TOKEN: looks like a secret",),
    ),
    Mistake(
        "a template whose labels nobody selects",
        lambda d: one(d, "StatefulSet", "realign-redis")["spec"]["selector"].update(matchLabels={"app": "redis"}),
        (r"^StatefulSet/realign-redis spec.selector: does not match the template's labels",),
    ),
    Mistake(
        "a StatefulSet whose Service is not there",
        lambda d: one(d, "StatefulSet", "realign-redis")["spec"].update(serviceName="redis"),
        (r"^StatefulSet/realign-redis spec.serviceName: there is no Service redis",),
    ),
    Mistake(
        "artifacts in the pod",
        lambda d: mlflow(d)["args"].remove("--artifacts-destination=$(ARTIFACTS_DESTINATION)"),
        (r"^Deployment/mlflow .*args: artifacts would lie in the pod",),
    ),
)
