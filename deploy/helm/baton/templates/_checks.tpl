{{/* What the schema cannot say: numbers and settings that contradict each other. Each message says what to do. */}}

{{/* A quantity of Kubernetes as a number of bytes. */}}
{{- define "baton.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) -}}
{{- if not (hasKey $units $unit) -}}{{- fail (printf "%v: write it with Ki, Mi, Gi or Ti" .) -}}{{- end -}}
{{- mulf (float64 (trimSuffix $unit (toString .))) (float64 (get $units $unit)) | int64 -}}
{{- end -}}

{{/* Variables that the chart sets; extraEnv must not contradict them. */}}
{{- define "baton.ownEnv" -}}
BATON_REGISTRY_PASSWORD BATON_NODE_NAME BATON_RACK_LABEL RAY_PROMETHEUS_HOST RAY_GRAFANA_HOST RAY_GRAFANA_IFRAME_HOST RAY_GRAFANA_DATA_DASHBOARD_UID RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S RAY_gcs_rpc_server_reconnect_timeout_s RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_REDIS_ADDRESS REDIS_PASSWORD REDIS_USERNAME RAY_REDIS_CA_CERT HF_TOKEN HF_HOME HF_HUB_OFFLINE HOME
{{- end -}}

{{- define "baton.check" -}}
{{- $v := .Values -}}
{{- if not $v.model.path -}}{{- fail "model.path is missing: a folder that every pod sees, or an id of the hub" -}}{{- end -}}
{{- include "baton.checkSecrets" . -}}
{{- range $name := list "router" "prefill" "decode" -}}
{{- include "baton.checkTier" (dict "name" $name "tier" (get $v $name)) -}}
{{- end -}}
{{- range $name := list "head" "router" "prefill" "decode" -}}
{{- include "baton.checkPod" (dict "name" $name "tier" (get $v $name)) -}}
{{- end -}}
{{- include "baton.checkRedis" . -}}
{{- include "baton.checkDevices" . -}}
{{- if semverCompare "<2.60.0-0" $v.ray.version -}}
{{- fail (printf "ray.version %s: replicas survive a SIGTERM of their pod only from 2.60.0 on" $v.ray.version) -}}
{{- end -}}
{{- if and (eq $v.modelCache.type "existingClaim") (not $v.modelCache.existingClaim) -}}{{- fail "modelCache.type existingClaim: name it in modelCache.existingClaim" -}}{{- end -}}
{{- if and (eq $v.modelCache.type "hostPath") (not $v.modelCache.hostPath) -}}{{- fail "modelCache.type hostPath: name it in modelCache.hostPath" -}}{{- end -}}
{{- if and (eq $v.modelCache.type "image") (not $v.modelCache.image.reference) -}}{{- fail "modelCache.type image: name it in modelCache.image.reference" -}}{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}{{- fail "ingress.host is missing" -}}{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}{{- fail "httpRoute.parentRefs is empty: name the gateway" -}}{{- end -}}
{{- end -}}

{{- define "baton.checkSecrets" -}}
{{- $v := .Values -}}
{{- if and (not $v.security.insecure) (not $v.security.existingSecret) -}}
{{- fail (printf "security.existingSecret is missing. Make it, and name it there:\n  kubectl -n %s create secret generic baton-secrets --from-literal=%s=$(openssl rand -hex 32) --from-literal=%s=$(openssl rand -hex 32) --from-literal=auth_token=$(openssl rand -hex 32)" .Release.Namespace $v.security.ticketKey $v.redis.passwordKey) -}}
{{- end -}}
{{- if and (include "baton.redisPassword" .) (not (include "baton.redisSecret" .)) -}}
{{- fail "redis.existingSecret is missing: the Secret with the password of Redis" -}}
{{- end -}}
{{- if and (eq $v.ray.auth.mode "token") (not (include "baton.raySecret" .)) -}}
{{- fail "ray.auth.existingSecret is missing: the Secret with Ray's auth_token" -}}
{{- end -}}
{{- $tls := list $v.security.tls.router $v.security.tls.prefill $v.security.tls.decode | compact | len -}}
{{- if and (ne $tls 0) (ne $tls 3) -}}
{{- fail "security.tls: name a Secret for each of router, prefill and decode, or for none" -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkTier" -}}
{{- $t := .tier -}}
{{- if gt (int $t.min) (int $t.max) -}}
{{- fail (printf "%s.min is %d and %s.max is %d: min must not be larger" .name (int $t.min) .name (int $t.max)) -}}
{{- end -}}
{{- $grace := $t.terminationGracePeriodSeconds -}}
{{- $least := add (int $t.successorSeconds) (int $t.drainSeconds) 60 | int -}}
{{- if and (not (kindIs "invalid" $grace)) (lt (int $grace) $least) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d: a successor within %d s and a drain of %d s need %d, or the pod is killed while it drains" .name (int $grace) (int $t.successorSeconds) (int $t.drainSeconds) $least) -}}
{{- end -}}
{{- $left := $t.pdb.minAvailable -}}
{{- if and $t.pdb.enabled (not (kindIs "invalid" $left)) (ge (int $left) (int $t.min)) -}}
{{- fail (printf "%s.pdb.minAvailable is %d with %s.min %d: no pod could ever be evicted, and nodes could not be drained" .name (int $left) .name (int $t.min)) -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkPod" -}}
{{- $memory := dig "limits" "memory" "" .tier.resources -}}
{{- if not $memory -}}{{- fail (printf "%s.resources.limits.memory is missing: Ray takes its size from it" .name) -}}{{- end -}}
{{- if ge (include "baton.bytes" .tier.shmSize | int64) (include "baton.bytes" $memory | int64) -}}
{{- fail (printf "%s.shmSize %s must be less than %s.resources.limits.memory %s, which it counts in" .name .tier.shmSize .name $memory) -}}
{{- end -}}
{{- $own := splitList " " (include "baton.ownEnv" .) -}}
{{- range .tier.extraEnv -}}
{{- if has .name $own -}}{{- fail (printf "%s.extraEnv: %s is set by the chart; use its value instead" $.name .name) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkRedis" -}}
{{- $r := .Values.redis -}}
{{- if eq $r.mode "external" -}}
{{- if not $r.external.url -}}{{- fail "redis.mode external: redis.external.url is missing" -}}{{- end -}}
{{- if regexMatch "^[^@]*://[^@/]*:[^@/]*@" $r.external.url -}}
{{- fail "redis.external.url has a password: put it into a Secret, and name that in redis.existingSecret" -}}
{{- end -}}
{{- if and $r.external.caSecret (not (hasPrefix "rediss" $r.external.url)) -}}
{{- fail "redis.external.caSecret is for rediss:// addresses" -}}
{{- end -}}
{{- if and .Values.ray.gcsFaultTolerance.enabled (contains "+" (urlParse $r.external.url).scheme) (not .Values.ray.gcsFaultTolerance.redisAddress) -}}
{{- fail "ray.gcsFaultTolerance.redisAddress is missing: Ray cannot read a Sentinel or cluster address" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkDevices" -}}
{{- $v := .Values -}}
{{- range $name := list "prefill" "decode" -}}
{{- $tier := get $v $name -}}
{{- if and $v.rdma.enabled (eq (dig "transport" "auto" $tier.flags) "shm") -}}
{{- fail (printf "rdma.enabled and %s.flags.transport shm exclude each other" $name) -}}
{{- end -}}
{{- if and (gt (int $tier.gpus) 0) (hasSuffix "-cpu" $v.image.tag) -}}
{{- fail (printf "%s.gpus is %d, and image.tag %s is the build without CUDA" $name (int $tier.gpus) $v.image.tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}
