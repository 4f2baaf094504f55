{{/* Names, labels, ports and addresses that several templates share. */}}

{{- define "baton.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (print .Release.Name "-" $name) (contains $name .Release.Name)) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects our pods. It never changes with a version: another pod template is another Ray cluster. */}}
{{- define "baton.selector" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "baton.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "baton.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "baton.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{- $kind := ternary "cuda" "cpu" (or (gt (int $.Values.prefill.gpus) 0) (gt (int $.Values.decode.gpus) 0)) -}}
{{ .repository }}:{{ .tag | default (printf "%s-%s" $.Chart.AppVersion $kind) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.httpPort" -}}8000{{- end -}}

{{/* Serve's own proxies forward for convenience, and KubeRay asks them how they are. Routers have port 8000. */}}
{{- define "baton.servePort" -}}8001{{- end -}}

{{- define "baton.ticketKeyFile" -}}/etc/baton/keys/{{ .Values.security.ticketKey }}{{- end -}}

{{- define "baton.redisSecret" -}}
{{- .Values.redis.existingSecret | default .Values.security.existingSecret -}}
{{- end -}}

{{- define "baton.raySecret" -}}
{{- .Values.ray.auth.existingSecret | default .Values.security.existingSecret -}}
{{- end -}}

{{/* "true" when Redis asks for a password. */}}
{{- define "baton.redisPassword" -}}
{{- if or (eq .Values.redis.mode "bundled") .Values.redis.external.passwordRequired -}}true{{- end -}}
{{- end -}}

{{/* Without the password: that comes from the environment. */}}
{{- define "baton.registryUrl" -}}
{{- if eq .Values.redis.mode "bundled" -}}
redis://{{ include "baton.fullname" . }}-redis:6379/0
{{- else -}}
{{- $url := .Values.redis.external.url -}}
{{- if .Values.redis.external.caSecret -}}
{{- $url = print $url (ternary "&" "?" (contains "?" $url)) "ca=/etc/baton/redis-ca/ca.crt" -}}
{{- end -}}
{{- $url -}}
{{- end -}}
{{- end -}}

{{/* One cluster, one model, one image: what differs in these must not meet in the registry. */}}
{{- define "baton.registryPrefix" -}}
{{- $what := printf "%s %s %s" .Values.model.path .Values.model.servedName (include "baton.image" .) -}}
{{- .Values.redis.prefix | default (printf "%s-%s-%s" .Release.Namespace (include "baton.fullname" .) (sha256sum $what | trunc 8)) -}}
{{- end -}}

{{/* host:port with its scheme, as Ray wants it: no user, no database, no options. */}}
{{- define "baton.gcsAddress" -}}
{{- if .Values.ray.gcsFaultTolerance.redisAddress -}}
{{- .Values.ray.gcsFaultTolerance.redisAddress -}}
{{- else if eq .Values.redis.mode "bundled" -}}
redis://{{ include "baton.fullname" . }}-redis:6379
{{- else -}}
{{- $parts := urlParse .Values.redis.external.url -}}
{{ $parts.scheme }}://{{ $parts.host }}
{{- end -}}
{{- end -}}

{{- define "baton.redisUser" -}}
{{- if eq .Values.redis.mode "external" -}}{{- (urlParse .Values.redis.external.url).userinfo -}}{{- end -}}
{{- end -}}

{{/* As JSON. What RDMA needs, unless a tier says otherwise. */}}
{{- define "baton.workerFlags" -}}
{{- $flags := dict -}}
{{- with .root.Values.rdma -}}
{{- if .enabled -}}
{{- $flags = dict "ucx_tls" .ucxTls "ucx_net_devices" .netDevices "expect_transport" .expectTransport "on_fallback" .onFallback -}}
{{- end -}}
{{- end -}}
{{- mergeOverwrite $flags .flags | toJson -}}
{{- end -}}
